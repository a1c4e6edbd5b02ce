"""What serves a request whatever it asks for: its context, and what decides which request runs."""
