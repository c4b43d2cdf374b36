"""Several processes that run one command together."""
