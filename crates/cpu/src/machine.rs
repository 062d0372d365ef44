//! What this machine can do, measured: the roofs of the roofline.
