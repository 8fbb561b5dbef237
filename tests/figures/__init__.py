"""The numbers that the sources print, reproduced with both engines: `python -m tests.figures`.

figures.json holds one entry a figure: `id`; `source`; `setup`, what is computed; `printed`, the source's own rounded
numbers, or null; `value`, the same unrounded; `atol`, how far a reproduction may be from either; `needs`, the data.
The modules beside it compute them, each with a function that `registry.figure` registers under the id.
"""
