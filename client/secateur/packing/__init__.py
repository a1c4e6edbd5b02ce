"""Files of sparse tensors: secateur's own, and the layouts of compressed-tensors."""
