"""The command line: eupmu unlearn, evaluate and report, for a model that `export_model` has written.

eupmu --version tells the versions and the devices that are here.
"""

import sys

from eupmu_jax import __main__ as here

# The exit status of a run whose budget could be kept by returning the original model only.
BROKEN_PROMISE = 3


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; ends the process with 1 and one line on stderr where it cannot be done."""
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        return here.main()
    try:
        # Not above: without the extra the command should say what is missing.
        import tyro

        from eupmu_jax.cli import report
        from eupmu_jax.cli.config import Command, Evaluate, Unlearn, with_settings
        from eupmu_jax.cli.evaluate import run_evaluate
        from eupmu_jax.cli.unlearn import run_unlearn

        config = tyro.cli(Command, prog="eupmu", args=with_settings(given), description=__doc__)  # pyright: ignore[reportCallIssue,reportArgumentType]
        if isinstance(config, Unlearn):
            if not run_unlearn(config):
                sys.exit(BROKEN_PROMISE)
        elif isinstance(config, Evaluate):
            run_evaluate(config)
        else:
            print(report.write(config.folder))
    except ImportError as error:
        needed = 'the command line needs the extra "cli": pip install -e ".[cli]" in a checkout'
        sys.exit(f"error: {error}; {needed}")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted: eupmu unlearn goes on with the same command.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
