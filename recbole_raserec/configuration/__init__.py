"""What the options are: rules, where values come from, checks, and configurations made from others."""
