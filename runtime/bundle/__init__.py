"""The bundle as a folder: its manifest, its files, and what must hold before anything of it is used."""
