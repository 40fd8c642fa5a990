"""How the shipped demonstration models were trained: vocabulary, training formats, curriculum and loop."""
