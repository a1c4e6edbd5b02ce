"""Sources and destinations that callers name by URI, if the operator has allowed them."""
