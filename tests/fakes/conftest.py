"""The example distribution is tested as installed: see ``tests/gateway/test_example_plugin.py``."""

collect_ignore = ["example_plugin"]
