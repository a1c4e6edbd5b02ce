"""What surrounds each call: tokens, TLS, statuses, logs, metrics, traces and health."""
