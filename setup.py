"Everything but the wheel's layout comes from settings.ini (nbdev's configuration)."

from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = here / 'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require={
        extra: cfg[f'{extra}_requirements'].split()
        for extra in ('diffusers', 'eval', 'features', 'notebooks', 'dev')
    },
    entry_points={
        'papermill.engine': [
            'neuralsolver = neuralsolver.tools.papermill_engine:NeuralSolverEngine'
        ]
    },
    # data/ travels in the wheel as neuralsolver/assets;
    # in a clone neuralsolver.utils.data_root() finds data/ itself
    packages=['neuralsolver', 'neuralsolver.tools', 'neuralsolver.assets'],
    package_dir={'neuralsolver': 'neuralsolver', 'neuralsolver.assets': 'data'},
    package_data={
        'neuralsolver.assets': [
            f'**/*.{ext}' for ext in ('json', 'jsonl', 'safetensors', 'npz', 'csv', 'md')
        ]
    },
    exclude_package_data={'neuralsolver.assets': ['golden/**']},
    include_package_data=False,
    zip_safe=False,
)
