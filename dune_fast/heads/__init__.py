"""Task heads on a frozen encoder: MASt3R's pointmaps and matches, Multi-HMR's people, linear segmentation and depth.

A head reads `tokens.EncoderTokens`, so one pass of the encoder serves all heads.
"""
