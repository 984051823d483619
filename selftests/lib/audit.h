/* SPDX-License-Identifier: GPL-2.0 */
/* rmmu's own audit of a VM's page tables. */
#ifndef RMMU_AUDIT_H
#define RMMU_AUDIT_H

/*
 * Audits the VMs of this process that are rmmu's, and ends the test if anything is broken. vCPUs may run meanwhile. `when`
 * says in the log when it was. Does nothing for VMs of in-tree KVM, which has no audit.
 */
void audit(const char *when);

#endif
