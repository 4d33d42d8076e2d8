"""What other packages need of this one beyond a loss; nothing here is imported by `import monai_iou`.

Each module needs the package that it is named after. docs/integrations.md has a recipe for each, and for the many
places where a loss or the bundle's folder is all that is needed.
"""
