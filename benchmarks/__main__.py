"""`python -m benchmarks row_lse | peers | scaling | maskd | af_dcd | kernels | page`.

Each command has its own `--help`.
"""

import argparse

from . import af_dcd, kernels, maskd, page, peers, row_lse, scaling

COMMANDS = {
    "row_lse": row_lse,
    "peers": peers,
    "scaling": scaling,
    "maskd": maskd,
    "af_dcd": af_dcd,
    "kernels": kernels,
    "page": page,
}


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))
    arguments = parser.parse_args(argv)
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
