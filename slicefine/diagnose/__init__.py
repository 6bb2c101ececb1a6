"""Look at a pretrained model and a little data before training: spectra, task energy, slice tangents, winning slices, advice."""
