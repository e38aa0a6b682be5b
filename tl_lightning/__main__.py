"""``python -m tl_lightning`` and the console script ``tl-lightning``."""


def main() -> None:
    """Run the command line on the arguments of the process."""
    from tl_lightning.cli import main as run

    run()


if __name__ == "__main__":
    main()
