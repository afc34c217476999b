"""Which layers gain from pseudo-labels, and which are harmed: their gradient, layer by layer.

For one state and many batches of draws that no training step sees, four gradients are taken of each
batch and averaged: of the labeled images (g_s); of the unlabeled rows with right pseudo-labels
(g_right) and with wrong ones (g_wrong), through the heads and with the weights of the run; and of
the same rows, heads and weights with the true labels (g_true). With g_u = g_right + g_wrong, a
layer gains as far as g_u points where g_true does.

Everything compared is a ratio of scalar products of mean gradients. So each layer's products of all
batches with all (a Gram matrix) are enough. A batch's noise is in its product with itself, which
makes lengths too large and cosines wrong: so only products of two different batches count.
"""
