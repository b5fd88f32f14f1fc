"""What is left on disk and shown: tables, pictures, the page, and where in the UNet neurons lie."""
