"""Claims about hf_automagic, one file each; `from tests.cases import ...` is how they share data."""
