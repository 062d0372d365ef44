//! Tensor names of GGUF files (llama.cpp's).
