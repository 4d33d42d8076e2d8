"""Evaluation of folders of volumes: pairing, one row per case and label, tables, statistics and a report.

`evaluate` pairs the files (`pairing`), scores each pair as a task (`case_files`, `scoring`, run by `workers`), and
writes the tables (`summary`, `statistics`) and the report (`report`). `compare` reads evaluated folders. nibabel,
SimpleITK, scipy, jinja2 and dask are imported where they are used, so that `import monai_iou` stays light.
"""
