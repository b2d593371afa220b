"""Every figure of the study as one command: python -m experiments list, run, figure."""
