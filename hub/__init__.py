"""To the Hugging Face Hub: model cards, publishing, conversion from one repository into another."""
