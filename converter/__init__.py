"""From an unquantized checkpoint to a quantized one: recipe, plan, streaming execution, verification."""
