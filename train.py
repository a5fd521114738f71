"""Debias a text-to-image model and measure it: fairdiff/jobs.py tells the steps.

python train.py                                    gender, LoRA on text encoder and U-Net, the embedded model
python train.py 'attribute=[gender,race]' target.gender.female=.7 target.gender.male=.3
python train.py audit=full seed=1                  every test prompt
"""

from fairdiff.start import train as task

if __name__ == "__main__":
    task()
