"""The Atlas: a page in the browser over recorded results. It computes no result; it shows what was measured."""
