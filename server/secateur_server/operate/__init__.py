"""The surroundings of each call: tokens, TLS, statuses, logs, metrics, traces and health."""
