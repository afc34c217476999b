"""TEMPORARY stand-in."""
import numpy as np
def crop_and_flip(images, offset, flip, pad, size):
    p = np.pad(images, ((0,0),(pad,pad),(pad,pad),(0,0)), mode="reflect")
    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, (y, x) in enumerate(offset):
        v = p[i, y:y+size, x:x+size]
        out[i] = v[:, ::-1] if flip[i] else v
    return out
def center_crop(images, size):
    o = (images.shape[1]-size)//2
    return images[:, o:o+size, o:o+size]
