"""The command line, ``bpfree``: fit with any rule, check and compare rules, and the recipes."""

from lightning_bpfree.cli.main import main as main
