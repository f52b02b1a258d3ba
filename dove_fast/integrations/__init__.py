"""DOVE beside other libraries: as an autoencoder, in a language model, in a DataLoader, as ONNX. One module each.

`autoencoder`: encode and decode as diffusers' autoencoders have them. `multimodal`: tokens in a language model's text.
`loading`: a token store's batches for torch's DataLoader. `portable`: the encoder and the token decoder as files of
ONNX or torch.export. None of these libraries is imported before it is needed.
"""
