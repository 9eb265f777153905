"""How sketches are evaluated: by torch, by compiled loops on a CPU, by Triton on a GPU."""
