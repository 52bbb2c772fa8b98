"""German-English grammar behind the built-in corpus; nothing here knows of files or training.

Data flows one way: numerals, words -> phrases -> times, quantities, events -> sentences.
"""
