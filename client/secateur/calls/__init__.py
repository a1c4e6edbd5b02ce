"""The methods of both clients as coroutines, on a Transport that does all input and output."""
