"""NeoForge Email: a company's own transactional e-mail, delivered from its own machines."""

from importlib.metadata import version

__version__ = version("neoforge-email")
