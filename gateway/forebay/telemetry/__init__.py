"""What Forebay tells about itself: spans, metrics, logs, decisions, observers.

Each module stands alone; ``docs/observability.md`` lists every name that leaves the process.
"""
