"""``python -m fedvision``."""

from fedvision.cli.app import run

if __name__ == "__main__":
    run()
