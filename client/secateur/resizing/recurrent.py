"""Sizes of recurrent layers."""

from typing import Any

from secateur.resizing.misfit import Misfit, expect


def fit_recurrent(new: Any, old: Any) -> None:
    """Fits an LSTM, GRU or RNN; all its layers and directions have one hidden size."""
    gates = old.weight_ih_l0.shape[0] // old.hidden_size
    new.hidden_size = _hidden(new.weight_ih_l0, gates, "weight_ih_l0")
    new.input_size = new.weight_ih_l0.shape[1]
    if new.proj_size:
        new.proj_size = new.weight_hr_l0.shape[0]
    output = new.proj_size or new.hidden_size
    rows = gates * new.hidden_size
    for layer in range(new.num_layers):
        columns = output * (2 if new.bidirectional else 1) if layer else new.input_size
        for suffix in (f"l{layer}", f"l{layer}_reverse"):
            expect(new, f"weight_ih_{suffix}", [rows, columns])
            expect(new, f"weight_hh_{suffix}", [rows, output])
            expect(new, f"weight_hr_{suffix}", [output, new.hidden_size])
            expect(new, f"bias_ih_{suffix}", [rows])
            expect(new, f"bias_hh_{suffix}", [rows])
    new.flatten_parameters()


def fit_cell(new: Any, old: Any) -> None:
    """Fits an LSTMCell, GRUCell or RNNCell."""
    gates = old.weight_ih.shape[0] // old.hidden_size
    new.hidden_size = _hidden(new.weight_ih, gates, "weight_ih")
    new.input_size = new.weight_ih.shape[1]
    expect(new, "weight_hh", [gates * new.hidden_size, new.hidden_size])
    for name in ("bias_ih", "bias_hh"):
        expect(new, name, [gates * new.hidden_size])


def _hidden(weight: Any, gates: int, name: str) -> int:
    rows: int = weight.shape[0]
    if rows % gates:
        raise Misfit(f"{name} has {rows} rows, which its {gates} gates do not divide")
    return rows // gates
