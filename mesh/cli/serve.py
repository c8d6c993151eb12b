"""`densemesh serve`: one pod, in the foreground."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import signal
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click
from click.core import ParameterSource

from loaders.memory.process import keep_message_buffers
from mesh.config import Config
from mesh.loop import new_event_loop
from mesh.pod import BadSetting, CannotStart, Pod

_TYPES = get_type_hints(Config)


def _read_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Values of the TOML file become defaults, so that flags and environment win over them."""
    if path is None:
        return None
    try:
        settings = tomllib.loads(path.read_text())
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from None
    for name in settings:
        if name not in _TYPES:
            raise click.BadParameter(f"{path}: unknown setting {name!r}; expected any of {', '.join(_TYPES)}")
    context.default_map = {**(context.default_map or {}), **settings}
    return path


def _settings(command: click.Command) -> click.Command:
    """One option per field of `Config`."""
    for f in fields(Config):
        command.params.append(
            click.Option(
                [f"--{f.name.replace('_', '-')}", f.name],
                type=_TYPES[f.name],
                default=f.default,
                envvar=f"DENSEMESH_{f.name.upper()}",
                help=f.metadata["help"],
                show_default=f.default != "",
                show_envvar=True,
            )
        )
    return command


@_settings
@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="DENSEMESH_CONFIG",
    is_eager=True,
    callback=_read_file,
    help="TOML file with any of these settings.",
)
@click.pass_context
def serve(context: click.Context, /, config_file: Path | None, **settings: Any) -> int:
    """Serve models over V2 gRPC until interrupted.

    Without --registry the pod is alone; with etcd://... it joins the pods that share that prefix.
    """
    config = Config(**settings)
    wrong = config.validate()
    if wrong is not None:
        raise click.UsageError(wrong)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr
    )
    for name, value in settings.items():
        source = context.get_parameter_source(name) or ParameterSource.DEFAULT
        shown = _PASSWORD.sub("***", str(value)) if name == "registry" else value
        print(f"{name} = {_toml(shown)}  # {_SOURCES[source]}", file=sys.stderr)
    try:
        keep_message_buffers()
        _allow_files()
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_run(Pod(config)))
    except BadSetting as error:
        raise click.UsageError(str(error)) from None
    except CannotStart as error:
        raise click.ClickException(str(error)) from None
    return 0


def _allow_files() -> None:
    """As many as may be open: a model that has files holds one or two of them, a client's connection one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _run(pod: Pod) -> None:
    """Until SIGINT or SIGTERM; a second one ends at once."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        pod.stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    await pod.run()


_PASSWORD = re.compile(r"(?<=:)[^:/@]*(?=@)")

_SOURCES = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.DEFAULT: "default",
    ParameterSource.PROMPT: "prompt",
}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False)
