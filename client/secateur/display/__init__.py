"""How results are shown to people in notebooks: HTML, frames of pandas, plots of matplotlib."""
