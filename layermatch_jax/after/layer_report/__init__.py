"""Layer reports: the gradients of pseudo-labels and of true labels, compared layer by layer.

A report averages four gradients over many batches whose draws no training step uses: of the labeled
images (g_s); of the unlabeled images with right pseudo-labels (g_right) and with wrong ones
(g_wrong), through the heads and with the weights of the run; and of the same images, heads and
weights with the true labels (g_true). With g_u = g_right + g_wrong, pseudo-labels help a layer if
g_u has a direction similar to g_true's, and harm it if the directions are opposite.

All quantities are ratios of scalar products of mean gradients, so it is enough to know each layer's
products between all batches (a Gram matrix). The product of a batch with itself contains the
batch's noise, which would make lengths too large and cosines wrong. So only products of two
different batches count.
"""
