"""The command line of ``fedvision``: one module a group of commands."""
