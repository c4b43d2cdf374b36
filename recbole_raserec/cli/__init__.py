"""The command line: one click application, `recbole_raserec.cli.main.main`."""
