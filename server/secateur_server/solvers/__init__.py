"""Methods that update the kept weights of a layer from the Gram matrix of its inputs.

All are pure functions of a weight [rows, columns] and a Gram matrix [columns, columns]. They
measure the same error: that of the layer's outputs, (w - w^) G (w - w^)^T, summed over the rows.
"""
