"""The models, composed of native transformers modules; one package per family."""
