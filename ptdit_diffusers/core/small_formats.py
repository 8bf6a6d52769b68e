"""Names of the number formats that make a model smaller, and of its parts that they fit. Needs no torch."""

GGUF_FORMATS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q4_k")  # one file for each part
FORMATS = ("int8", "fp8", *GGUF_FORMATS)
QUANTIZED_PARTS = ("transformer", "text_encoder")
