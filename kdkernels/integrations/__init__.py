"""Stand-ins for the losses of other libraries: their names, signatures and values, our kernels."""
