"""Calls on URIs whose files lie apart: the work on each file is a task of a cluster.

A piece is a file of the model. The server reads no weights: it has the headers (model.py), divides
the rules among the files (rules.py), decides the cuts of tensors that are compared across files
from summaries (decide.py), and puts the parts of reports and results together (report.py,
prune.py). A task does what a server does with a whole model, with the same functions (work.py).
What is not divisible is worked on by the server itself.
"""
