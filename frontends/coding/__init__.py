"""The coder of quantised weights: context modelling in whole arrays, entropy coding by asymmetric numeral systems.

``tensors`` is what others use; ``significance`` models which weights are not zero, ``magnitudes`` how large they are,
``tallies`` counts what has been seen, ``fixed_point`` has the integer arithmetic that makes models the same on every
platform, ``streams`` turns modelled symbols into bytes and back by ``ans``. No training, no parameters but a few in the
head of a stream. DeepCABAC (Wiedemann et al., arXiv 1907.11900) codes weight by weight with the last two as context;
here contexts are of the whole tensor.
"""
