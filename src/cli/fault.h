/* Checkpoints are read through maps: a page that a disk does not give back, or that a shortened file no
 * longer has, arrives as a signal. Whatever was running stops there as by a kill, with a sentence that names
 * the file.
 */
#ifndef CLI_FAULT_H
#define CLI_FAULT_H

void fault_name_files(void); /* from now on, in all threads */
#endif
