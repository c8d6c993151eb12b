"""The world: a clock, a registry, pods, a network between them, and clients that ask for models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from random import Random
from typing import Final

from placement.lifecycle import IN_FLIGHT, CopyState
from placement.messages import CopyWanted, Hop, StartLoad
from placement.policies import POLICIES
from placement.policies.base import EvictionPolicy
from placement.records import ModelId, ModelRecord, PodId, model_key, tenant_key
from placement.simulator.chaos import Chaos
from placement.simulator.checks import Checks, Violation
from placement.simulator.clock import TICKS_PER_MS, Clock, Tick, ticks
from placement.simulator.loader import TIER_SHARE
from placement.simulator.options import Options
from placement.simulator.pods import SimPod
from placement.simulator.registry import Batch, Registry
from placement.simulator.report import Report, Tenant
from placement.simulator.requests import WAIT, Call, Failed, Outcome, Request, walk_of
from placement.simulator.scenario import Workload
from placement.simulator.trace import Trace
from placement.simulator.transport import Transport
from placement.simulator.world_checks import may_be_refused

START_MS: Final = 1_700_000_000_000
"""The world begins at this Unix time."""
_UNDER_WAY: Final = (*IN_FLIGHT, CopyState.UNLOADING)
_WARM: Final = 10 * TICKS_PER_MS
"""Between two loads of one pod before requests come."""
_PROBES: Final = 100
"""Models that are asked for once more when all is at rest."""


class World:
    """One run; `run` is called once."""

    def __init__(
        self, options: Options, workload: Workload, policy: Callable[[], EvictionPolicy] | None = None
    ) -> None:
        self.options = options
        self.workload = workload
        self.policy = policy or POLICIES[options.policy]
        """Of the device's tier, and of those below."""
        self.models = {model.model_id: model for model in workload.models}
        self.clock = Clock()
        self.trace = Trace() if options.trace else None
        self.checks = Checks(options.check_every)
        self.report = Report()
        self.registry = Registry(self.clock, ticks(options.lease_ttl_ms))
        self.registry.on_batch = self._delivered
        self.chaos = Chaos(self)
        self.transport = Transport(self)
        self.pods: dict[PodId, SimPod] = {}
        self.open = 0
        """Clients' requests that have not ended."""
        self._names = [f"p{number}" for number in range(options.pods)]
        self._timeout = ticks(options.timeout_ms)
        self._draw = Random(f"clients {options.seed}").random
        self._runs = {model.model_id: ticks(model.run_ms) for model in workload.models}
        self._arrivals: Iterator[tuple[float, int]] = iter(())
        self._next = (0.0, 0)
        self._first: Tick = 0
        """When requests begin to arrive: all pods know each other by then."""
        self._warm_until: Tick = 0
        self._counted_from: Tick = 0

    def run(self) -> Report:
        """Let requests and faults come, then let everything come to rest.

        Raises:
            Violation: an invariant does not hold.
        """
        try:
            self._begin()
            self.clock.run(self._first + ticks(self.options.duration_ms))
            self._rest()
        except Violation:
            raise
        except Exception as bug:
            raise Violation("no event breaks the engine", f"{type(bug).__name__}: {bug}") from bug
        return self._reported()

    def told(self, violation: Violation) -> str:
        """What did not hold, when, and what had happened to whom it concerns."""
        at_ms = self.clock.now / TICKS_PER_MS
        lines = [f"VIOLATION after {at_ms:.1f} ms, {violation.pod or 'world'}: {violation}"]
        if self.trace is not None:
            pod_id = violation.pod.pod_id if violation.pod else ""
            lines += map(str, self.trace.last(60, pod_id, violation.model_id))
        return "\n".join(lines)

    def _begin(self) -> None:
        options = self.options
        for number, model in enumerate(self.workload.models, 1):
            self.registry.put(model_key(model.model_id), self.registration(model.model_id, number))
        for grant in self.workload.grants:
            self.registry.put(tenant_key(grant.tenant_id), grant)
        for number in range(options.pods):
            pod = SimPod(self, number, 1)
            self.pods[pod.pod_id] = pod
            pod.start()
        self._first = ticks(options.first_ms) + (self._warm_up() if options.warm else 0)
        self._counted_from = self._first + int(options.duration_ms * options.warmup * TICKS_PER_MS)
        self._arrivals = self.workload.arrivals()
        self._next = next(self._arrivals, (options.duration_ms, -1))
        self.clock.after(1_000 * TICKS_PER_MS, self._forget)
        if self._next[1] >= 0:
            self.clock.after(self._first, self._arrive)
        self.clock.after(self._first, self.chaos.begin)

    def _warm_up(self) -> Tick:
        """Load the models, each on one pod; how long that takes."""
        rounds = -(-len(self.models) // len(self.pods))
        self._warm_until = (rounds + 1) * _WARM
        shares: list[list[ModelId]] = [[] for _ in self.pods]
        for number, model in enumerate(self.workload.models):
            shares[number % len(shares)].append(model.model_id)
        for pod, share in zip(self.pods.values(), shares, strict=True):
            self.clock.after(_WARM, self._warm_next, (pod, iter(share)))
        return self._warm_until

    def _warm_next(self, what: tuple[SimPod, Iterator[ModelId]]) -> None:
        pod, models = what
        model_id = next(models, None)
        cache = pod.engine.cache
        if model_id is not None and self.models[model_id].size_bytes <= cache.capacity_bytes - cache.committed_bytes:
            pod.sync()
            pod.step(CopyWanted(model_id, pod.now_ms))
            self.clock.after(_WARM, self._warm_next, what)

    def _rest(self) -> None:
        """Faults end, and what they did heals; after that nothing is under way, and every model can be had."""
        self.chaos.end()
        self._pass(self.chaos.heals_in_ms)
        self._settle()
        if self.open:
            raise Violation("every request ends", f"{self.open} requests are open")
        self.checks.at_rest(self)
        for pod in self.pods.values():
            self.tally(pod)
        report, self.report = self.report, Report()  # what the probes cause is no part of it
        models, probes = list(self.registry.head.models), max(10, _PROBES // self.options.check_every)
        for model_id in models[:: max(1, len(models) // probes)]:
            self._probe(model_id)
        self.report = report
        self._pass(10 * self.options.lag_ms)
        self._settle()
        self.checks.at_rest(self)
        self.checks.count += len(self.pods)
        for pod in self.pods.values():
            self.checks.pod(pod)

    def _settle(self) -> None:
        """Wait until nothing has been under way for a while; the leader may load ahead for some time."""
        quiet = 0
        for _ in range(1_000):
            busy = self.open or any(
                pod.engine.cache.count(*_UNDER_WAY) or pod.publisher.is_behind for pod in self.pods.values()
            )
            quiet = 0 if busy else quiet + 1
            if quiet == 3:
                return
            self._pass(1_000)

    def _probe(self, model_id: ModelId) -> None:
        """No model is lost: it is served, or told why not."""
        answers: list[Outcome] = []
        pod = self.pods[self._names[int(self._draw() * len(self._names))]]
        request = Request(self.models[model_id], self.clock.now, 1, answers.append)
        self.begin(Call(request, pod, Hop.CLIENT, self.clock.now + ticks(600_000)))
        while not answers:
            self._pass(100)
        self.checks.count += 1
        model, capacity_bytes = self.registry.head.models[model_id], self.options.capacity_bytes
        size_bytes, estimate_bytes = self.true_bytes(model), self.estimate_bytes(model)
        expected = {Outcome.OK} if size_bytes <= capacity_bytes else set()
        if max(size_bytes, estimate_bytes) > capacity_bytes:
            expected.add(Outcome.LOAD_FAILED)
        kept = [other.engine.scaling.kept_bytes for other in self.pods.values()]
        if max(size_bytes, estimate_bytes) > capacity_bytes - max(kept):
            expected.add(Outcome.NO_ROOM)  # a pod that cannot make any; so are all that can be reached
            if self.options.faults.lost_messages:
                expected.add(Outcome.POD_UNAVAILABLE)
        if may_be_refused(self, model.tenant):
            expected.add(Outcome.NO_ROOM)
        if not expected.issuperset(answers):
            said = f"of {size_bytes} bytes, estimated {estimate_bytes}, answered {answers[0].value!r}"
            raise Violation("no model is lost", said, pod, model_id)

    def _pass(self, ms: float) -> None:
        self.clock.run(self.clock.now + ticks(ms))

    def _reported(self) -> Report:
        report = self.report
        report.events = self.clock.calls
        report.checks = self.checks.count
        report.digest = self.trace.digest if self.trace else blake2b(repr(report).encode(), digest_size=16).hexdigest()
        return report

    # Pods

    def kill(self, pod: SimPod) -> None:
        """The process ends at once; its lease runs out later. Whoever talks to it notices."""
        pod.alive = pod.serving = False
        self.tally(pod)
        calls, pod.calls = pod.calls, {}
        self.clock.after(ticks(self.options.lease_ttl_ms) + 1, self.checks.lease, pod)
        for call in calls:
            assert call.walk is not None
            call.walk.close()
            self._tell(call, Outcome.POD_UNAVAILABLE if call.caller else Outcome.CONNECTION_LOST)

    def start(self, number: int) -> None:
        """The process of that name is started anew."""
        before = self.pods[f"p{number}"]
        pod = self.pods[before.pod_id] = SimPod(self, number, before.life + 1)
        pod.start()

    def tally(self, pod: SimPod) -> None:
        self.report.evictions += pod.engine.stats.evictions
        self.report.forwards += pod.engine.stats.forwards

    def _delivered(self, batch: Batch) -> None:
        """Pods look at what the watch brings when something happens to them; for some news they do not wait."""
        if batch.rare:
            for pod in self.pods.values():
                self.clock.after(pod.lag, pod.sync)

    def _forget(self, _: object) -> None:
        """Nobody needs what everybody knows to be past."""
        seen = [pod.view.seen for pod in self.pods.values() if pod.alive]
        self.registry.past.forget(min(seen, default=self.registry.revision))
        self.clock.after(1_000 * TICKS_PER_MS, self._forget)

    def registration(self, model_id: ModelId, number: int) -> ModelRecord:
        """Another one, with other contents than those before."""
        model = self.models[model_id]
        return ModelRecord(
            model_id,
            "sim",
            f"{model_id}/{number}",
            tenant=model.tenant,
            slo_ms=round(model.slo_ms),
            **model.placement,
        )

    # What pods ask the world for

    @property
    def unix_ms(self) -> int:
        """By a clock that is right."""
        return START_MS + self.clock.now // TICKS_PER_MS

    def true_bytes(self, model: ModelRecord) -> int:
        """A registration's size in memory."""
        return self.chaos.sizes.get((model.model_id, model.created)) or self.models[model.model_id].size_bytes

    def estimate_bytes(self, model: ModelRecord) -> int:
        return self.chaos.misjudge(model, self.true_bytes(model))

    def load(self, pod: SimPod, action: StartLoad) -> tuple[float, bool]:
        """How long a load takes, in ms, and whether it fails then."""
        report, model_id = self.report, action.model.model_id
        report.loads += 1
        others = (self.pods[pod_id] for pod_id in self.registry.head.copies(model_id) if pod_id != pod.pod_id)
        report.double_loads += any(model_id in other.loader.loading for other in others)
        if self.clock.now < self._warm_until:
            return 1.0, False
        ms, fails = self.chaos.load(self.models[model_id].load_ms * TIER_SHARE[action.source])
        if fails:
            report.failed_loads += 1
        else:
            report.bytes_moved[action.source or "store"] += self.true_bytes(action.model)
        return ms, fails

    def ensure(self, pod: SimPod, model_id: ModelId, on_end: Callable[[Outcome], None]) -> None:
        """`mesh.residency.Residency.ensure_quietly`"""
        request = Request(self.models[model_id], self.clock.now, 0, on_end)
        self.begin(Call(request, pod, Hop.CLIENT, self.clock.now + ticks(600_000)))

    def load_on(self, pod: SimPod, model_id: ModelId, target: PodId, on_end: Callable[[Outcome], None]) -> None:
        """`mesh.residency.Residency.load_on`"""
        request = Request(self.models[model_id], self.clock.now, 0, on_end)
        deadline = self.clock.now + ticks(600_000)
        if target == pod.pod_id:
            self.begin(Call(request, pod, Hop.LOAD_HERE, deadline))
        elif target in pod.view.pods:
            self.transport.send(pod, Call(request, self.pods[target], Hop.LOAD_HERE, deadline))
        else:
            on_end(Outcome.POD_UNAVAILABLE)

    # Calls

    def begin(self, call: Call) -> None:
        call.walk = walk_of(call)
        call.pod.calls[call] = None
        self.go(call)

    def go(self, call: Call) -> None:
        """Take a call's walk to its next pause."""
        pod, walk = call.pod, call.walk
        if walk is None or not pod.alive:
            return
        pod.sync()
        pause = next(walk, 0)
        now = self.clock.now
        if pause > 0:
            self.clock.after(pause, self.go, call)
        if (pause == WAIT or now + pause > call.deadline) and not call.timed:
            call.timed = True
            self.clock.after(max(0, call.deadline - now), self._expire, call)

    def answered(self, call: Call, outcome: Outcome) -> None:
        del call.pod.calls[call]
        call.walk = None  # or the two would hold each other
        self._tell(call, outcome)

    def _tell(self, call: Call, outcome: Outcome) -> None:
        if call.caller is not None:
            self.transport.answer(call, outcome)
        elif call.request.on_end is not None:
            call.request.on_end(outcome)
        else:
            self._ended(call.request, outcome)

    def _expire(self, call: Call) -> None:
        self._stop(call, Outcome.DEADLINE)

    def _cancel(self, call: Call) -> None:
        """The client, or the pod that forwarded the call, has gone away; whom it was forwarded to hears of that."""
        awaited = call.awaits
        self._stop(call, Outcome.CANCELLED)
        if awaited is not None:
            self.clock.after(ticks(self.options.network_ms), self._cancel, awaited)

    def _stop(self, call: Call, outcome: Outcome) -> None:
        if call in call.pod.calls:
            assert call.walk is not None
            try:
                call.walk.throw(Failed(outcome))
            except StopIteration:
                return
            raise Violation("a request ends at its deadline", "it goes on", call.pod, call.request.model.model_id)

    # Clients

    def _arrive(self, _: object = None) -> None:
        now, (at_ms, index) = self.clock.now, self._next
        while (at := self._first + int(at_ms * TICKS_PER_MS)) <= now:
            self._ask(index)
            following = next(self._arrivals, None)
            if following is None:
                return
            at_ms, index = self._next = following
        self.clock.after(at - now, self._arrive)

    def _ask(self, index: int) -> None:
        """A client asks a pod that takes calls, if there is one."""
        model, now, names = self.workload.models[index], self.clock.now, self._names
        request = Request(model, now, self._runs[model.model_id])
        self.report.all_requests += 1
        self.open += 1
        first = int(self._draw() * len(names))
        pod = self.pods[names[first]]
        if not pod.serving:
            others = (self.pods[name] for name in names[first + 1 :] + names[:first])
            found = next((other for other in others if other.serving), None)
            if found is None:
                self._ended(request, Outcome.CONNECTION_LOST)
                return
            pod = found
        call = Call(request, pod, Hop.CLIENT, now + self._timeout)
        leaves = self.chaos.leaves()
        if leaves:
            self.clock.after(leaves, self._cancel, call)
        self.begin(call)

    def _ended(self, request: Request, outcome: Outcome) -> None:
        self.open -= 1
        self.checks.ended(self, request)
        model, took = request.model, self.clock.now - request.began
        if self.trace is not None:
            said = f"request ended after {took / TICKS_PER_MS:.1f} ms: {outcome.value}"
            self.trace.say(self.clock.now, "", model.model_id, said)
        if request.began < self._counted_from:
            return
        report = self.report
        tenant = report.tenants.get(model.tenant)
        if tenant is None:
            tenant = report.tenants[model.tenant] = Tenant()
        report.requests += 1
        tenant.requests += 1
        report.outcomes[outcome.value] += 1
        if outcome is Outcome.OK:
            report.latencies[took] += 1
        else:
            tenant.failed += 1
        if request.missed:
            report.misses += 1
            tenant.misses += 1
        if outcome is not Outcome.OK or took > model.slo_ms * TICKS_PER_MS:
            report.slo_violations += 1
            tenant.slo_violations += 1
