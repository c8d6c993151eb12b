"""`densemesh`, also as `python -m mesh`."""

from __future__ import annotations

import sys

import click

from mesh import __version__
from mesh.cli.bench import bench
from mesh.cli.explain import explain
from mesh.cli.manage import COMMANDS
from mesh.cli.migrate import migrate
from mesh.cli.serve import serve
from mesh.cli.tenants import tenant
from mesh.cli.up import up


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="densemesh")
def cli() -> None:
    """Serve many models from few pods. `densemesh serve --models DIR` is one pod, `densemesh up` a cluster."""


for command in (serve, up, bench, *COMMANDS, explain, tenant, migrate):
    cli.add_command(command)


def main() -> None:
    """Run the command line; a wrong value is answered in one sentence on stderr and status 2."""
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        print(f"densemesh: {error.format_message()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
