"""The manifests of `operator/config/`.

Authorities: the OpenAPI schemas of Kubernetes 1.30 and of the newest release that kubernetes-validate ships; kubectl's
kustomize, where it is installed; `densemesh serve` for the settings.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from loaders import ALIASES, LOADERS
from mesh import __version__
from mesh.cli.serve import serve
from mesh.config import Config, parse_bytes
from mesh_operator.__main__ import main
from tests.deploy.kustomize import Manifest, build, identity, manifests_in
from tests.mesh.certificates import Authority

CONFIG = Path(__file__).resolve().parents[2] / "operator" / "config"
OLDEST = "1.30"
COMPONENTS = sorted(path.name for path in (CONFIG / "components").iterdir())
OVERLAYS = sorted(path.name for path in (CONFIG / "overlays").iterdir())

FOREIGN = {
    "serving.kserve.io/v1alpha1": {"ClusterServingRuntime"},
    "cert-manager.io/v1": {"Certificate", "Issuer"},
    "monitoring.coreos.com/v1": {"ServiceMonitor", "PodMonitor", "PrometheusRule"},
    "keda.sh/v1alpha1": {"ScaledObject"},
    "gateway.networking.k8s.io/v1": {"GRPCRoute"},
}
"""Of CRDs that others bring, whose schemas no package ships."""


def with_component(tmp_path: Path, *names: str) -> Path:
    """The default overlay with components, as a user would write it."""
    relative = Path("..") / ".." / ".." / "config"
    folder = tmp_path / "overlays" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "config").symlink_to(CONFIG)
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization", "resources:"]
    lines += [f"- {relative.relative_to('..')}/overlays/default", "components:"]
    lines += [f"- {relative.relative_to('..')}/components/{name}" for name in names]
    (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(params=[*OVERLAYS, *(f"default+{name}" for name in COMPONENTS), "default+all"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> list[Manifest]:
    """Each overlay, and the default with each component, and with all."""
    overlay, _, component = request.param.partition("+")
    if not component:
        return build(CONFIG / "overlays" / overlay)
    return build(with_component(tmp_path, *(COMPONENTS if component == "all" else [component])))


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def mesh(manifests: list[Manifest]) -> Manifest:
    (found,) = [m for m in of_kind(manifests, "StatefulSet") if m["metadata"]["name"] == "densemesh"]
    return found


def container(workload: Manifest) -> dict[str, Any]:
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_schemas(built: list[Manifest], version: str) -> None:
    """Kubernetes' own kinds by their schemas, strictly; others are of a version and kind that we know there is."""
    for manifest in built:
        known = FOREIGN.get(manifest["apiVersion"])
        if known is None:
            kubernetes_validate.validate(manifest, version, strict=True)
        else:
            assert manifest["kind"] in known


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl to compare with")
@pytest.mark.parametrize("component", ["", *COMPONENTS])
def test_kubectl_builds_the_same(tmp_path: Path, component: str) -> None:
    folder = with_component(tmp_path, component) if component else CONFIG / "overlays" / "dev"
    (tmp_path / "built.yaml").write_text(
        subprocess.run(["kubectl", "kustomize", str(folder)], check=True, capture_output=True, text=True).stdout
    )
    theirs = manifests_in(tmp_path / "built.yaml")
    (generated,) = [m["metadata"]["name"] for m in of_kind(theirs, "ConfigMap")]
    assert re.fullmatch(r"densemesh-[a-z0-9]{10}", generated)
    theirs = json.loads(json.dumps(theirs).replace(f'"{generated}"', '"densemesh"'))
    assert {identity(m): m for m in theirs} == {identity(m): m for m in build(folder)}


def test_every_file_is_part_of_something() -> None:
    used = set()
    for file in CONFIG.rglob("kustomization.yaml"):
        (told,) = manifests_in(file)
        used |= {(file.parent / name).resolve() for name in told.get("resources", ())}
    files = {path for path in CONFIG.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert files == {path for path in used if path.is_file()}


def labels_selected(manifest: Manifest) -> dict[str, str]:
    """By its selector, whatever its kind calls it."""
    spec = manifest["spec"]
    selector = spec.get("selector") or spec.get("podSelector")
    return dict(selector.get("matchLabels", selector))


def test_selectors_find_pods_and_services(built: list[Manifest]) -> None:
    workloads = of_kind(built, "StatefulSet", "Deployment")
    pods = [workload["spec"]["template"]["metadata"]["labels"] for workload in workloads]
    for manifest in of_kind(built, "Service", "PodDisruptionBudget", "NetworkPolicy", "StatefulSet", "Deployment"):
        wanted = labels_selected(manifest).items()
        assert [labels for labels in pods if wanted <= labels.items()], identity(manifest)
        assert len([labels for labels in pods if wanted <= labels.items()]) == 1, identity(manifest)
    for workload in workloads:
        assert labels_selected(workload).items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        for spread in workload["spec"]["template"]["spec"].get("topologySpreadConstraints", ()):
            assert spread["labelSelector"]["matchLabels"] == labels_selected(workload)
    for monitor in of_kind(built, "ServiceMonitor"):
        wanted = labels_selected(monitor).items()
        (service,) = [m for m in of_kind(built, "Service") if wanted <= m["metadata"]["labels"].items()]
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    for monitor in of_kind(built, "PodMonitor"):
        (pod,) = [workload for workload in workloads if labels_selected(monitor) == labels_selected(workload)]
        ports = {port["name"] for port in container(pod)["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_references_lead_somewhere(built: list[Manifest]) -> None:
    """Names of Services, ServiceAccounts, ConfigMaps, Secrets and ports that manifests say of each other."""
    there = {identity(manifest) for manifest in built}
    certificates = {m["spec"]["secretName"] for m in of_kind(built, "Certificate")}
    for workload in of_kind(built, "StatefulSet", "Deployment"):
        namespace, pod = workload["metadata"]["namespace"], workload["spec"]["template"]["spec"]
        if "serviceName" in workload["spec"]:
            assert ("Service", namespace, workload["spec"]["serviceName"]) in there
        if "serviceAccountName" in pod:
            assert ("ServiceAccount", namespace, pod["serviceAccountName"]) in there
        one = container(workload)
        for source in one.get("envFrom", ()):
            assert ("ConfigMap", namespace, source["configMapRef"]["name"]) in there
        templates = workload["spec"].get("volumeClaimTemplates", ())
        volumes = [v["name"] for v in pod.get("volumes", ())] + [t["metadata"]["name"] for t in templates]
        assert sorted(volumes) == sorted(mount["name"] for mount in one["volumeMounts"])
        for volume in pod.get("volumes", ()):
            secret = volume.get("secret")
            assert secret is None or secret.get("optional") or secret["secretName"] in certificates
        ports = {port["name"] for port in one["ports"]}
        assert {one[probe]["httpGet"]["port"] for probe in one if probe.endswith("Probe")} <= ports
        for service in of_kind(built, "Service"):
            if labels_selected(service).items() <= workload["spec"]["template"]["metadata"]["labels"].items():
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
        for policy in of_kind(built, "NetworkPolicy"):
            if labels_selected(policy).items() <= workload["spec"]["template"]["metadata"]["labels"].items():
                assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} <= ports
    for route in of_kind(built, "GRPCRoute"):
        for backend in route["spec"]["rules"][0]["backendRefs"]:
            assert ("Service", "densemesh", backend["name"]) in there
    for scaled in of_kind(built, "ScaledObject"):
        target = scaled["spec"]["scaleTargetRef"]
        assert (target["kind"], "densemesh", target["name"]) in there
        assert "replicas" not in mesh(built)["spec"]  # or applying again undoes the scaling


def test_pods_may_do_little(built: list[Manifest]) -> None:
    """Kubernetes, Pod Security Standards, level restricted; and no file system to write to but volumes."""
    for workload in of_kind(built, "StatefulSet", "Deployment"):
        pod, one = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in one["resources"]["limits"]
        assert pod["enableServiceLinks"] is False


def environment(manifests: list[Manifest]) -> dict[str, str]:
    """Of the mesh's container, as the kubelet would set it."""
    one = container(mesh(manifests))
    (settings,) = [m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"] == "densemesh"]
    told = dict(settings["data"])
    fields = {"metadata.name": "densemesh-0", "spec.nodeName": "ip-10-0-0-1.ec2.internal"}
    for variable in one["env"]:
        source = variable.get("valueFrom", {})
        if "fieldRef" in source:
            told[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
        elif "resourceFieldRef" in source:
            assert source["resourceFieldRef"]["resource"] == "requests.cpu"
            told[variable["name"]] = "2"  # rounded up (resourceFieldRef, divisor)
        else:
            told[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: told[name[1]], variable["value"])
    return told


def test_settings_are_those_of_serve(
    built: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`densemesh serve` takes the environment that the pods get, and it fits what the pod is given."""
    told = environment(built)
    variables = {f"DENSEMESH_{name.upper()}" for name in Config.__dataclass_fields__}
    assert {name for name in told if name.startswith("DENSEMESH_")} <= variables
    mounted = tmp_path_factory.mktemp("etc")
    (mounted / "storage-config").mkdir()
    certificate, key = Authority(mounted).issue()
    (mounted / "tls").mkdir()
    for source, name in ((certificate, "tls.crt"), (key, "tls.key"), (certificate, "ca.crt")):
        shutil.copy(source, mounted / "tls" / name)
    for name, value in told.items():
        monkeypatch.setenv(name, value.replace("/etc/densemesh", str(mounted)))
    params = serve.make_context("serve", []).params
    config = Config(**{name: value for name, value in params.items() if name != "config_file"})
    assert config.validate() is None
    pod, one = mesh(built)["spec"]["template"]["spec"], container(mesh(built))
    pre_stop_s = float(one["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pre_stop_s + config.drain_timeout_s + 10
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert ports == {"grpc": config.grpc_port, "metrics": config.metrics_port}
    held = config.capacity if config.device == "cpu" else config.host_memory
    assert parse_bytes(held) < 0.75 * parse_bytes(one["resources"]["limits"]["memory"] + "B")
    assert config.cache_bytes is not None
    assert config.prepared_bytes is not None
    sizes = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "cache"]
    sizes += [
        t["spec"]["resources"]["requests"]["storage"] for t in mesh(built)["spec"].get("volumeClaimTemplates", ())
    ]
    (size,) = sizes
    assert config.cache_bytes + config.prepared_bytes < parse_bytes(size + "B")
    mounts = [mount["mountPath"] for mount in one["volumeMounts"]]
    for value in told.values():
        if value.startswith("/"):
            assert any(value == mount or value.startswith(mount + "/") for mount in mounts), value


def test_certificates_are_for_the_names_that_are_called(tmp_path: Path) -> None:
    """RFC 9525 §6.3: pods check each other's by DENSEMESH_TLS_NAME, clients by the Services' names."""
    built = build(with_component(tmp_path, "tls"))
    (certificate,) = [m for m in of_kind(built, "Certificate") if m["spec"]["secretName"] == "densemesh-tls"]
    names = certificate["spec"]["dnsNames"]
    assert environment(built)["DENSEMESH_TLS_NAME"] in names
    assert {"server auth", "client auth"} <= set(certificate["spec"]["usages"])
    for service in of_kind(built, "Service"):
        assert f"{service['metadata']['name']}.densemesh.svc.cluster.local" in names
        assert all(port.get("appProtocol") != "kubernetes.io/h2c" for port in service["spec"]["ports"])


def test_images_are_of_this_version(built: list[Manifest]) -> None:
    for workload in of_kind(built, "StatefulSet", "Deployment", "ClusterServingRuntime"):
        template = workload["spec"].get("template", workload)
        (one,) = template["spec"]["containers"]
        name, _, tag = one["image"].rpartition(":")
        assert tag == __version__ or name.endswith("/etcd")


def test_the_runtime_has_every_format() -> None:
    """KServe, ServingRuntime: `multiModel`, formats with `autoSelect`; one priority for each format (its webhook)."""
    (runtime,) = of_kind(build(CONFIG / "runtime"), "ClusterServingRuntime")
    spec = runtime["spec"]
    assert spec["multiModel"] is True
    entries = spec["supportedModelFormats"]
    assert {entry["name"] for entry in entries} == {*LOADERS, *ALIASES} - {"synthetic"}
    assert all(entry["autoSelect"] is True and entry["priority"] == 1 for entry in entries)
    named = [(entry["name"], entry.get("version")) for entry in entries]
    assert len(named) == len(set(named))
    assert all(version is None or isinstance(version, str) for _, version in named)


def test_alerts_and_triggers_ask_for_metrics_that_there_are(tmp_path: Path) -> None:
    """Names as a pod exposes them."""
    built = build(with_component(tmp_path, "monitoring", "autoscaling"))
    asked = set(re.findall(r"\bdensemesh_[a-z0-9_]+", json.dumps(of_kind(built, "PrometheusRule", "ScaledObject"))))
    root = CONFIG.parents[1]
    source = (root / "mesh" / "metrics.py").read_text()
    stats = re.findall(r"^    ([a-z_]+): int = 0$", (root / "placement" / "stats.py").read_text(), re.MULTILINE)
    exposed = {f"densemesh_{name}_total" for name in stats}
    for kind, name in re.findall(r'(Gauge|Counter|Histogram)MetricFamily\(\s*"(densemesh_[a-z_]+)"', source):
        ends = {"Gauge": ("",), "Counter": ("_total",), "Histogram": ("_bucket", "_count", "_sum")}[kind]
        exposed |= {name + end for end in ends}
    exposed |= set(re.findall(r'_by_state\("(densemesh_[a-z_]+)"', source))
    assert len(asked) >= 8
    assert asked <= exposed, asked - exposed


def test_the_operators_flags_are_its_own(built: list[Manifest]) -> None:
    (operator,) = of_kind(built, "Deployment")
    one = container(operator)
    told = main.make_context("densemesh-operator", list(one["args"]), resilient_parsing=True).params
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert ports == {"health": told["health_port"], "metrics": told["metrics_port"]}
    services = {f"{m['metadata']['name']}.densemesh.svc:8033" for m in of_kind(built, "Service")}
    assert told["target"] in services
    assert told["grpc_url"].removeprefix("grpc://") in services
    (storage,) = [
        v["secret"] for v in mesh(built)["spec"]["template"]["spec"]["volumes"] if v["name"] == "storage-config"
    ]
    assert told["storage_config"] == f"densemesh/{storage['secretName']}"
    if of_kind(built, "Certificate"):
        assert told["tls_ca"] == Path("/etc/densemesh/tls/ca.crt")


def granted(role: Manifest) -> set[tuple[str, str, str]]:
    """Resource, of one name if the rule says so, and verb."""
    grants = set()
    for rule in role["rules"]:
        (group,) = rule["apiGroups"]
        for resource in rule["resources"]:
            for name in rule.get("resourceNames", [""]):
                where = ":".join(filter(None, (f"{group}/{resource}".lstrip("/"), name)))
                grants |= {(role["kind"], where, verb) for verb in rule["verbs"]}
    return grants


def test_the_operator_may_what_it_does_and_no_more() -> None:
    """Kubernetes, RBAC good practices: least privilege. Watched by kopf, which also watches CRDs; called by `kube`."""
    package = CONFIG.parent / "mesh_operator"
    watched = set(re.findall(r'kopf\.on\.event\(_GROUP, "\w+", "(\w+)"', (package / "handlers.py").read_text()))
    assert watched == {"inferenceservices", "servingruntimes", "clusterservingruntimes"}
    called = set(re.findall(r"self\._kube\.(\w+)\(", "".join(path.read_text() for path in package.glob("*.py"))))
    assert called == {"get", "create", "patch", "replace"}
    built = build(CONFIG / "operator")
    needed = {
        ("ClusterRole", f"{group}/{plural}", verb)
        for group, plurals in (
            ("serving.kserve.io", watched),
            ("apiextensions.k8s.io", {"customresourcedefinitions"}),
        )
        for plural in plurals
        for verb in ("list", "watch")
    } | {
        ("ClusterRole", "serving.kserve.io/inferenceservices", "patch"),
        ("ClusterRole", "serving.kserve.io/inferenceservices/status", "patch"),
        ("ClusterRole", "events", "create"),
        ("ClusterRole", "configmaps:inferenceservice-config", "get"),
        ("Role", "secrets:storage-config", "get"),
        ("Role", "coordination.k8s.io/leases", "create"),
        ("Role", "coordination.k8s.io/leases:densemesh-operator", "get"),
        ("Role", "coordination.k8s.io/leases:densemesh-operator", "update"),
    }
    assert set().union(*(granted(role) for role in of_kind(built, "Role", "ClusterRole"))) == needed
    there = {identity(manifest) for manifest in built}
    for binding in of_kind(built, "RoleBinding", "ClusterRoleBinding"):
        role, (subject,) = binding["roleRef"], binding["subjects"]
        assert (role["kind"], binding["metadata"].get("namespace", ""), role["name"]) in there
        assert ("ServiceAccount", subject["namespace"], subject["name"]) in there
