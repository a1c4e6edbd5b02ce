"""Specs of a request: decoded, checked, and fitted to the tensors of a state_dict."""
